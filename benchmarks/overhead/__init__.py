"""What steering costs: vLLM's own benchmarks, with and without the plugin, in turns."""
