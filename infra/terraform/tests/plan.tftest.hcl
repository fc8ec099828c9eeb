# Plans of the real provider, for an account that does not exist: it checks arguments, types and names as it would before an apply, and
# asks AWS nothing, since the only things to ask (zones, account number) are given here.

provider "aws" {
  region                      = "us-east-1"
  access_key                  = "none"
  secret_key                  = "none"
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  skip_requesting_account_id  = true
}

override_data {
  target = data.aws_availability_zones.available
  values = { names = ["us-east-1a", "us-east-1b", "us-east-1c", "us-east-1d"] }
}

override_data {
  target = data.aws_caller_identity.current
  values = { account_id = "123456789012" }
}

variables {
  region           = "us-east-1"
  api_access_cidrs = ["203.0.113.7/32"]
  budget           = { monthly_usd = 500, emails = ["team@example.com"] }
}

run "defaults" {
  command = plan

  assert {
    condition     = length(aws_subnet.private) == 3 && length(distinct([for subnet in aws_subnet.private : subnet.cidr_block])) == 3
    error_message = "Three private subnets, one a zone, with blocks of their own."
  }
  assert {
    condition     = alltrue([for subnet in concat(values(aws_subnet.private), values(aws_subnet.public)) : subnet.map_public_ip_on_launch == false])
    error_message = "Nothing that is launched gets a public address."
  }
  assert {
    condition     = aws_vpc_endpoint.s3.vpc_endpoint_type == "Gateway" && aws_vpc_endpoint.s3.service_name == "com.amazonaws.us-east-1.s3"
    error_message = "Weights and image layers take the free endpoint, not the NAT."
  }
  assert {
    condition     = aws_eks_cluster.this.upgrade_policy[0].support_type == "STANDARD"
    error_message = "Extended support, at six times the price, is never slid into."
  }
  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_private_access && toset(aws_eks_cluster.this.vpc_config[0].public_access_cidrs) == toset(["203.0.113.7/32"])
    error_message = "The API answers within the VPC, and of the internet the given addresses alone."
  }
  assert {
    condition     = contains(aws_eks_cluster.this.encryption_config[0].resources, "secrets") && aws_kms_key.secrets.enable_key_rotation
    error_message = "Kubernetes secrets are encrypted with a key that rotates."
  }
  assert {
    condition     = toset(aws_eks_cluster.this.enabled_cluster_log_types) == toset(["api", "audit", "authenticator"]) && aws_cloudwatch_log_group.cluster.retention_in_days == 30
    error_message = "Control plane logs are kept, for a month."
  }
  assert {
    condition     = aws_eks_cluster.this.access_config[0].authentication_mode == "API" && aws_eks_cluster.this.access_config[0].bootstrap_cluster_creator_admin_permissions
    error_message = "Access goes by access entries; without a list of administrators it is whoever applies."
  }
  assert {
    condition     = jsondecode(aws_eks_addon.node["vpc-cni"].configuration_values).enableNetworkPolicy == "true"
    error_message = "The chart's NetworkPolicies are enforced."
  }
  assert {
    condition     = aws_launch_template.system.metadata_options[0].http_tokens == "required" && aws_launch_template.system.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "Pods do not reach the credentials of their node."
  }
  assert {
    condition     = aws_eks_node_group.system.instance_types == tolist(["t3.large"]) && aws_eks_node_group.system.scaling_config[0].max_size == 3
    error_message = "What always runs is two small CPU nodes."
  }
  assert {
    condition     = aws_s3_bucket.weights.bucket == "sdar-weights-123456789012-us-east-1" && aws_s3_bucket.weights.force_destroy == false
    error_message = "One bucket, whose weights are not deleted without being asked."
  }
  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.weights.block_public_acls, aws_s3_bucket_public_access_block.weights.block_public_policy,
      aws_s3_bucket_public_access_block.weights.ignore_public_acls, aws_s3_bucket_public_access_block.weights.restrict_public_buckets,
    ])
    error_message = "The bucket is private."
  }
  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.weights.rule).apply_server_side_encryption_by_default[0].sse_algorithm == "AES256"
    error_message = "The bucket is encrypted."
  }
  assert {
    condition     = aws_s3_bucket_lifecycle_configuration.weights.rule[0].abort_incomplete_multipart_upload[0].days_after_initiation == 1
    error_message = "Uploads that a dead learner left incomplete go after a day."
  }
  assert {
    condition     = toset(keys(aws_ecr_repository.image)) == toset(["sdar-gateway", "sdar-envs", "sdar-teacher", "sdar-learner", "sdar-rollout"])
    error_message = "A repository for each image."
  }
  assert {
    condition     = alltrue([for repository in aws_ecr_repository.image : repository.image_tag_mutability == "IMMUTABLE" && repository.force_delete])
    error_message = "Tags never change, and destroying leaves no image behind."
  }
  assert {
    condition     = output.registry == "123456789012.dkr.ecr.us-east-1.amazonaws.com/sdar"
    error_message = "The chart finds its images at the repositories made here."
  }
  assert {
    condition     = aws_budgets_budget.account.limit_amount == "500" && aws_budgets_budget.account.time_unit == "MONTHLY"
    error_message = "The budget has the given limit."
  }
  assert {
    condition     = alltrue([for notification in aws_budgets_budget.account.notification : notification.subscriber_email_addresses == toset(["team@example.com"])])
    error_message = "Every notification reaches the given address."
  }
  assert {
    condition     = toset([for notification in aws_budgets_budget.account.notification : notification.threshold]) == toset([50, 80, 100])
    error_message = "Told at 50 and 80%, and at a forecast of 100%."
  }
  assert {
    condition     = length(aws_fsx_lustre_file_system.checkpoints) + length(aws_placement_group.learner) + length(aws_ce_cost_allocation_tag.project) == 0
    error_message = "Nothing that costs by the hour, or that AWS refuses on the first day, is made without being asked for."
  }
}

run "several_nodes" {
  command = plan

  variables {
    learner    = { instance_types = ["p5.48xlarge"], max_gpus = 16, efa = true, zone = "us-east-1c" }
    lustre_gib = 2400
  }

  assert {
    condition     = aws_placement_group.learner[0].strategy == "cluster"
    error_message = "The learner's nodes are near each other."
  }
  assert {
    condition     = aws_fsx_lustre_file_system.checkpoints[0].storage_capacity == 2400 && aws_fsx_lustre_file_system.checkpoints[0].deployment_type == "PERSISTENT_2"
    error_message = "Checkpoints of several nodes are on Lustre."
  }
  assert {
    condition     = contains(keys(aws_eks_addon.cluster), "aws-fsx-csi-driver")
    error_message = "The driver that mounts Lustre comes with it."
  }
}

run "administrators_by_name_within_the_vpc" {
  command = plan

  variables {
    api_access_cidrs     = []
    admin_principal_arns = ["arn:aws:iam::123456789012:role/admin"]
  }

  assert {
    condition     = !aws_eks_cluster.this.vpc_config[0].endpoint_public_access
    error_message = "Without addresses the API has no public endpoint."
  }
  assert {
    condition     = !aws_eks_cluster.this.access_config[0].bootstrap_cluster_creator_admin_permissions
    error_message = "Named administrators replace whoever applies."
  }
  assert {
    condition     = keys(aws_eks_access_policy_association.admin) == ["arn:aws:iam::123456789012:role/admin"]
    error_message = "The named role administers the cluster."
  }
}
