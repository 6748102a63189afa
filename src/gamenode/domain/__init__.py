"""What things are: types, transition tables and pure rules. No I/O, no clock, no `async`."""
