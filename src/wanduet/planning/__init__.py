"""What runs where, decided before anything is loaded."""
