"""What ops are compared with: fp64 references, AutoDeco as released, and what peers do."""
