"""The control plane: edges over nouns over the engine room."""
