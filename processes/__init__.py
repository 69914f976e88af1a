"""Child processes: how one is started, what it is given, how it is watched and how it ends."""
