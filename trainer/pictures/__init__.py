"""PNG files, contact sheets and charts."""
