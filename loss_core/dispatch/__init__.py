"""From a flag `BACKEND[:KERNEL]` to a built loss: backend protocol, flags, and the tables of builders."""
