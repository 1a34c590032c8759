"""What comes through the door: PyTorch modules, exported programs and Hugging Face folders become ONNX files."""
