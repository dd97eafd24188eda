"""The command line: up, down, status, chat."""
