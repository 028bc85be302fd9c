"""What a run is: recipes, profiles and accelerate configs, typed and checked, and where its model lies."""
