"""What a first layer costs as a table, and the lookup that takes its place."""
