"""From a flag `BACKEND[:KERNEL]` to a built loss: what a backend offers, what a flag means, who builds what."""
