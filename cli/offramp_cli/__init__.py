"""The command line: one file per command, each importing a part only when it is called."""
