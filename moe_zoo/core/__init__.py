"""The types everything meets at: decisions, contexts, aux, parameters, schemas. Knows arrays, no models."""
