"""Dual-Head Optimization (arXiv 2505.07675): few labels, many unlabelled images, a large teacher, a small fast student."""

__version__ = "0.1.0"
