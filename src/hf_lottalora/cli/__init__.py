"""What the commands of `lottalora` do. Their options and help are in `hf_lottalora_cli`, which imports no torch."""
