"""How the bundled model and adapters were made, and how to make your own adapter."""
