"""What the worlds share whose tiny models this repository trains itself."""
