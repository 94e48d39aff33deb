"""Ops: argument checks, backend choice, `torch.library` registration and autograd."""
