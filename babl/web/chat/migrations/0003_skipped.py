"""Questions that a model cannot read are answers with a reason."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("chat", "0002_search")]
    operations = [
        migrations.AddField("runanswer", "skipped", models.TextField(blank=True, default=""), preserve_default=False)
    ]
