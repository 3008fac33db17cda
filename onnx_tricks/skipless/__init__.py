"""What merge-skipless is made of: which layer can go at a junction, and the graph without it."""
