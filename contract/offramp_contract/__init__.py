"""What the exporter writes and the server reads, and the rules both apply."""
