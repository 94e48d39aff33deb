"""The torch backend: every op in plain torch, chunked and fast on CPUs."""
