"""Adapters measured: spectra, angles and conflicts, representations. Knows updates, and neither tasks nor configs."""
