# A repository for each of the five images. Tags never change; images can be built again, so destroying deletes them.

locals {
  images   = ["sdar-gateway", "sdar-envs", "sdar-teacher", "sdar-learner", "sdar-rollout"]
  registry = "${local.account_id}.dkr.ecr.${var.region}.amazonaws.com/${var.name}"
}

resource "aws_ecr_repository" "image" {
  for_each = toset(local.images)

  name                 = "${var.name}/${each.value}"
  image_tag_mutability = "IMMUTABLE"
  force_delete         = true

  image_scanning_configuration {
    scan_on_push = true
  }
}

resource "aws_ecr_lifecycle_policy" "image" {
  for_each = aws_ecr_repository.image

  repository = each.value.name
  policy = jsonencode({
    rules = [{
      rulePriority = 1
      description  = "Storage is billed: the five newest are enough to go back."
      selection    = { tagStatus = "any", countType = "imageCountMoreThan", countNumber = 5 }
      action       = { type = "expire" }
    }]
  })
}
