"""Part by part: plan, pipeline, output."""
