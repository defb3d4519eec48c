"""Figures drawn from plain data: scan paths, sample cards, contact sheets, training curves. No torch."""
