"""What slim attention needs beside its pass: plans, weights, positions and states of layers."""
