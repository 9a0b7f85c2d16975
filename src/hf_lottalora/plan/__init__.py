"""What becomes of each tensor of a model: surveyed, decided and validated before anything is changed."""
