"""Where the bytes of logs lie."""
