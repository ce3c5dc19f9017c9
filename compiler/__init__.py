"""From a model and a recipe to an artifact. The only folder that imports all others."""
