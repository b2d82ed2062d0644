"""The commands: arguments in, sentences, tables and plots out; one file each."""
