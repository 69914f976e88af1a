"""The backends: what each of them must offer, which one serves, and one folder for each."""
