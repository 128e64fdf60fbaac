"""The ground floor: the only thing that rooms share. A room imports core and torch, never another room."""
