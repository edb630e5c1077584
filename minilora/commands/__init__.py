"""The command line: one file a command or family, each with an `add` that says which arguments it takes. arguments.py and folders.py serve them all."""
