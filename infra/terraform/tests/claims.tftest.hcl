# What only shows once everything has an identity: the policies, and the manifests and values that come out. AWS is mocked, so all of it is
# "applied" in seconds and nothing exists.

mock_provider "aws" {
  mock_data "aws_availability_zones" {
    defaults = { names = ["us-east-1a", "us-east-1b", "us-east-1c"] }
  }
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_resource "aws_eks_cluster" {
    defaults = {
      arn        = "arn:aws:eks:us-east-1:123456789012:cluster/sdar"
      identity   = [{ oidc = [{ issuer = "https://oidc.eks.us-east-1.amazonaws.com/id/ABC" }] }]
      vpc_config = { cluster_security_group_id = "sg-0c" }
    }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/mock" }
  }
  mock_resource "aws_iam_instance_profile" {
    defaults = { arn = "arn:aws:iam::123456789012:instance-profile/mock" }
  }
  mock_resource "aws_iam_openid_connect_provider" {
    defaults = { arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.us-east-1.amazonaws.com/id/ABC" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000" }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::mock-weights" }
  }
  mock_resource "aws_sqs_queue" {
    defaults = { arn = "arn:aws:sqs:us-east-1:123456789012:mock", id = "https://sqs.us-east-1.amazonaws.com/123456789012/mock" }
  }
  mock_resource "aws_cloudwatch_event_rule" {
    defaults = { arn = "arn:aws:events:us-east-1:123456789012:rule/mock" }
  }
  mock_resource "aws_subnet" {
    defaults = { id = "subnet-0" }
  }
  mock_resource "aws_security_group" {
    defaults = { id = "sg-0" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }
}

override_resource {
  target = aws_iam_role.service_account["weights-writer"]
  values = { arn = "arn:aws:iam::123456789012:role/sdar-weights-writer" }
}

override_resource {
  target = aws_iam_role.service_account["weights-reader"]
  values = { arn = "arn:aws:iam::123456789012:role/sdar-weights-reader" }
}

override_resource {
  target = aws_subnet.private["us-east-1b"]
  values = { id = "subnet-0b" }
}

variables {
  region           = "us-east-1"
  api_access_cidrs = ["203.0.113.7/32"]
  budget           = { monthly_usd = 500, emails = ["team@example.com"] }
}

run "defaults" {
  assert {
    condition = alltrue([for name in ["rollout", "learner"] :
      contains([for taint in local.node_pools[name].taints : "${taint.key}:${taint.effect}"], "nvidia.com/gpu:NoSchedule")
    ])
    error_message = "GPU nodes take nothing but pods that ask for a GPU."
  }
  assert {
    condition = alltrue([for pool in local.node_pool_manifests :
      pool.spec.disruption.consolidationPolicy == "WhenEmpty" && pool.spec.disruption.consolidateAfter == "2m" && !contains(keys(pool.spec), "replicas")
    ])
    error_message = "Every pool is empty when nothing runs, two minutes after the last pod."
  }
  assert {
    condition = alltrue([for pool in local.node_pool_manifests :
      contains(pool.spec.disruption.budgets, { nodes = "0", reasons = ["Drifted", "Underutilized"] })
    ])
    error_message = "A running pod is not moved for a newer image or a tighter packing."
  }
  assert {
    condition     = local.node_pools.rollout.limits == { "nvidia.com/gpu" = 10 } && local.node_pools.learner.limits == { "nvidia.com/gpu" = 4 }
    error_message = "The number of GPUs that can run is bounded."
  }
  assert {
    condition     = alltrue([for pool in local.node_pool_manifests : length(pool.spec.limits) == 1])
    error_message = "No pool without a limit."
  }
  assert {
    condition     = local.node_pools.learner.requirements["karpenter.sh/capacity-type"].values == ["on-demand"] && local.node_pools.control.requirements["karpenter.sh/capacity-type"].values == ["on-demand"]
    error_message = "The learner, the gateway and Redis are never on spot nodes."
  }
  assert {
    condition     = tolist(local.node_pools.rollout.requirements["karpenter.sh/capacity-type"].values) == tolist(["spot"])
    error_message = "Rollouts are on spot nodes."
  }
  assert {
    condition     = alltrue([for class in local.node_class_manifests : class.spec.metadataOptions == { httpEndpoint = "enabled", httpTokens = "required", httpPutResponseHopLimit = 1 }])
    error_message = "Pods do not reach the credentials of their node."
  }
  assert {
    condition     = alltrue(flatten([for class in local.node_class_manifests : [for device in class.spec.blockDeviceMappings : device.ebs.encrypted && device.ebs.deleteOnTermination]]))
    error_message = "Disks of nodes are encrypted and go with their node."
  }
  assert {
    condition     = alltrue([for class in local.node_class_manifests : class.spec.tags.project == "sdar"])
    error_message = "What Karpenter launches carries the tag that tells costs apart."
  }
  assert {
    condition     = alltrue([for class in local.node_class_manifests : !contains(keys(class.spec), "placementGroupSelector") && length(class.spec.securityGroupSelectorTerms) == 1])
    error_message = "Without efa there are no placement group and no EFA security group."
  }
  assert {
    condition     = toset([for rule in aws_cloudwatch_event_rule.interruption : jsondecode(rule.event_pattern)["detail-type"][0]]) == toset(["EC2 Spot Instance Interruption Warning", "EC2 Instance Rebalance Recommendation", "EC2 Instance State-change Notification", "AWS Health Event"])
    error_message = "Karpenter hears of interruptions before they happen."
  }
  assert {
    condition = { for name, role in aws_iam_role.service_account : name => jsondecode(role.assume_role_policy).Statement[0].Condition.StringLike["oidc.eks.us-east-1.amazonaws.com/id/ABC:sub"] } == {
      ebs-csi        = ["system:serviceaccount:kube-system:ebs-csi-controller-sa"]
      karpenter      = ["system:serviceaccount:kube-system:karpenter"]
      weights-reader = ["system:serviceaccount:sdar:*-rollout", "system:serviceaccount:sdar:*-teacher"]
      weights-writer = ["system:serviceaccount:sdar:*-learner"]
    }
    error_message = "Roles trust the service accounts that need them, those of releases in the one namespace alone."
  }
  assert {
    condition = alltrue([for role in aws_iam_role.service_account :
      jsondecode(role.assume_role_policy).Statement[0].Condition.StringEquals["oidc.eks.us-east-1.amazonaws.com/id/ABC:aud"] == "sts.amazonaws.com" && jsondecode(role.assume_role_policy).Statement[0].Action == "sts:AssumeRoleWithWebIdentity"
    ])
    error_message = "Roles of service accounts are taken on with a token made for AWS, in no other way."
  }
  assert {
    condition = alltrue([for name, policy in aws_iam_role_policy.weights :
      jsondecode(policy.policy).Statement[0].Resource == "arn:aws:s3:::mock-weights/weights/*" && jsondecode(policy.policy).Statement[1].Condition.StringLike["s3:prefix"] == "weights/*"
    ])
    error_message = "Access to the bucket ends at the prefix of the weights."
  }
  assert {
    condition     = jsondecode(aws_iam_role_policy.weights["weights-reader"].policy).Statement[0].Action == ["s3:GetObject"]
    error_message = "Rollouts and teachers read weights; only the learner writes them."
  }
  assert {
    condition = alltrue([for statement in jsondecode(aws_iam_role_policy.karpenter.policy).Statement :
      can(statement.Condition) || statement.Resource != "*" || alltrue([for action in flatten([statement.Action]) : can(regex(":(Get|List|Describe)", action))])
    ])
    error_message = "Karpenter changes nothing without a condition on whose it is."
  }
  assert {
    condition = alltrue([for statement in jsondecode(aws_iam_role_policy.karpenter.policy).Statement :
      statement.Condition.StringEquals["aws:ResourceTag/kubernetes.io/cluster/sdar"] == "owned" if statement.Sid == "EndOwn"
    ])
    error_message = "Karpenter ends only this cluster's instances."
  }
  assert {
    condition     = yamldecode(output.helm_values).storage == { weightsUrl = "s3://sdar-weights-123456789012-us-east-1/weights" }
    error_message = "The release is told its weight store; checkpoints have a volume of their own."
  }
  assert {
    condition = { for role in ["learner", "rollout", "teacher"] : role => yamldecode(output.helm_values)[role].serviceAccount.annotations["eks.amazonaws.com/role-arn"] } == {
      learner = "arn:aws:iam::123456789012:role/sdar-weights-writer"
      rollout = "arn:aws:iam::123456789012:role/sdar-weights-reader"
      teacher = "arn:aws:iam::123456789012:role/sdar-weights-reader"
    }
    error_message = "Each service account gets its role."
  }
  assert {
    condition     = yamldecode(output.karpenter_values).settings.clusterName == "sdar" && yamldecode(output.karpenter_values).settings.interruptionQueue == "sdar-interruption"
    error_message = "Karpenter is told its cluster and its queue."
  }
  assert {
    condition     = sort([for document in split("---\n", output.cluster_manifests) : "${yamldecode(document).kind}/${yamldecode(document).metadata.name}"]) == sort(["StorageClass/sdar-gp3", "Namespace/sdar", "EC2NodeClass/sdar", "EC2NodeClass/sdar-learner", "NodePool/sdar-control", "NodePool/sdar-environments", "NodePool/sdar-rollout", "NodePool/sdar-learner"])
    error_message = "What `kubectl apply` gets is valid YAML and all there is to apply."
  }
}

run "several_nodes" {
  variables {
    learner    = { instance_types = ["p5.48xlarge"], max_gpus = 16, efa = true, zone = "us-east-1b" }
    lustre_gib = 1200
  }

  assert {
    condition     = { for class in local.node_class_manifests : class.metadata.name => can(class.spec.placementGroupSelector.name) } == { sdar = false, sdar-learner = true }
    error_message = "EFA is the learner's alone."
  }
  assert {
    condition = alltrue([for class in local.node_class_manifests :
      class.spec.subnetSelectorTerms == [{ id = "subnet-0b" }] && contains(class.spec.securityGroupSelectorTerms, { id = aws_security_group.efa[0].id }) if class.metadata.name == "sdar-learner"
    ])
    error_message = "EFA nodes are in one subnet, in the group that lets EFA through."
  }
  assert {
    condition     = aws_vpc_security_group_egress_rule.efa[0].referenced_security_group_id == aws_security_group.efa[0].id && aws_vpc_security_group_ingress_rule.efa[0].referenced_security_group_id == aws_security_group.efa[0].id
    error_message = "EFA traffic is allowed by group, both ways."
  }
  assert {
    condition     = tolist(local.node_pools.learner.requirements["topology.kubernetes.io/zone"].values) == tolist(["us-east-1b"]) && tolist(aws_fsx_lustre_file_system.checkpoints[0].subnet_ids) == tolist(["subnet-0b"])
    error_message = "The learner and its checkpoints are in one zone."
  }
  assert {
    condition     = yamldecode(output.helm_values).storage.existingClaim == "checkpoints"
    error_message = "The release is told the claim of its checkpoints."
  }
  assert {
    condition     = length([for document in split("---\n", output.cluster_manifests) : document if contains(["PersistentVolume", "PersistentVolumeClaim"], yamldecode(document).kind)]) == 2
    error_message = "The file system comes with a volume and a claim."
  }
}

run "the_whole_internet_is_refused" {
  command = plan
  variables { api_access_cidrs = ["0.0.0.0/0"] }
  expect_failures = [var.api_access_cidrs]
}

run "a_budget_that_nobody_hears_is_refused" {
  command = plan
  variables { budget = { monthly_usd = 500, emails = [] } }
  expect_failures = [var.budget]
}

run "a_budget_of_nothing_is_refused" {
  command = plan
  variables { budget = { monthly_usd = 0, emails = ["team@example.com"] } }
  expect_failures = [var.budget]
}

run "a_pool_without_a_bound_is_refused" {
  command = plan
  variables { learner = { max_gpus = 0 } }
  expect_failures = [var.learner]
}

run "a_cpu_type_for_the_learner_is_refused" {
  command = plan
  variables { learner = { instance_types = ["m6i.large"] } }
  expect_failures = [var.learner]
}

run "an_unknown_capacity_type_is_refused" {
  command = plan
  variables { rollout = { capacity_types = ["cheap"] } }
  expect_failures = [var.rollout]
}

run "an_odd_lustre_size_is_refused" {
  command = plan
  variables { lustre_gib = 1000 }
  expect_failures = [var.lustre_gib]
}

run "a_shared_namespace_is_refused" {
  command = plan
  variables { namespace = "default" }
  expect_failures = [var.namespace]
}

run "an_old_kubernetes_is_refused" {
  command = plan
  variables { kubernetes_version = "1.20" }
  expect_failures = [var.kubernetes_version]
}

run "a_gpu_for_what_never_stops_is_refused" {
  command = plan
  variables { system_instance_type = "g5.xlarge" }
  expect_failures = [var.system_instance_type]
}

run "a_zone_that_is_not_used_is_refused" {
  command = plan
  variables { learner = { zone = "us-east-1f" } }
  expect_failures = [aws_vpc.this]
}
