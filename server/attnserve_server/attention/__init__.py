"""From a selection and raw weights to maps: resolve, crop, reduce, links. Pure functions on arrays."""
