"""Planning: the question of a comparison, fixed, hashed and priced before anything runs."""
