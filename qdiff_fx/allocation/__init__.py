"""Bits where they matter: error estimates, sensitivity, allocation, channel factors, quality targets."""
