"""Who runs where. The simulator runs all clients on this machine."""
