"""What denoises action chunks: the U-Net, samplers as tables, the loop."""
