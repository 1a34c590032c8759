"""What `featherweight demo` needs: a real pretrained network and a few real photos."""
