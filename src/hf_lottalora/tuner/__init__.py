"""The PEFT tuner: carries out a plan on a model, and switches, merges, saves and reseeds what is there."""
