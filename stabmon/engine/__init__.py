"""What happens at each step of training: what is measured of it, and what follows from that."""
