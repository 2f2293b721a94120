"""Code that imports Triton. Nothing outside imports it before the first product runs."""
