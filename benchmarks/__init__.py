"""One script per question; each prints a table and JSON on its last line."""
