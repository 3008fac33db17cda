"""The survey of all families: what each trick does to each export, checked against PyTorch."""
