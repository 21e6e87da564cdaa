"""Read and write local files; read remote ones."""
