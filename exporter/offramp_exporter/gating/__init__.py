"""Gates: marks in a program -> bodies that are stages of their own, and the proof that nothing else changed."""
