"""Everything that speaks SQL; nothing of Celery."""
