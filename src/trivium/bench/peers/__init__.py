"""The rivals, each run as its own documentation says; imported only when asked for."""
