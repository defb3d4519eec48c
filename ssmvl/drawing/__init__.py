"""Drawings of plain data: scan paths, sample cards, contact sheets and training curves. No torch."""
