"""Where a model runs: devices, the server next door, the cloud, and splits between them."""
