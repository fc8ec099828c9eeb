variable "name" {
  description = "Name of the cluster and prefix of everything beside it."
  type        = string
  default     = "sdar"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name must be 2 to 31 lower-case letters, digits or dashes and begin with a letter: it becomes part of role and bucket names."
  }
}

variable "region" {
  description = "AWS region. Choose one in which your GPU quotas are granted (docs/eks.md)."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be the code of an AWS region, such as us-east-1."
  }
}

variable "tags" {
  description = "Tags of every resource, beside project = name."
  type        = map(string)
  default     = {}
}

variable "num_zones" {
  description = "Availability zones to spread over: the more, the more spot capacity there is to choose from."
  type        = number
  default     = 3

  validation {
    condition     = var.num_zones == floor(var.num_zones) && var.num_zones >= 2 && var.num_zones <= 6
    error_message = "num_zones must be a whole number from 2 to 6: EKS wants subnets in at least two zones."
  }
}

variable "vpc_cidr" {
  description = "Address block of the VPC, a /16: the six private subnets it leaves room for have 8,190 addresses each, one a pod."
  type        = string
  default     = "10.40.0.0/16"

  validation {
    condition     = can(cidrnetmask(var.vpc_cidr)) && endswith(var.vpc_cidr, "/16")
    error_message = "vpc_cidr must be an IPv4 block of size /16, such as 10.40.0.0/16."
  }
}

variable "kubernetes_version" {
  description = "Minor version of EKS. When its standard support ends, AWS upgrades the cluster rather than charging for extended support."
  type        = string
  default     = "1.35"

  validation {
    condition     = can(regex("^1\\.(29|[3-9][0-9])$", var.kubernetes_version))
    error_message = "kubernetes_version must be a minor version from 1.29, such as 1.35: `aws eks describe-cluster-versions` lists those that EKS offers."
  }
}

variable "api_access_cidrs" {
  description = "Addresses that may reach the Kubernetes API from the internet, such as [\"203.0.113.7/32\"]. An empty list: only from within the VPC."
  type        = list(string)

  validation {
    condition     = alltrue([for cidr in var.api_access_cidrs : can(cidrnetmask(cidr)) && !endswith(cidr, "/0")])
    error_message = "api_access_cidrs must be IPv4 blocks, none of them the whole internet (/0): give your own address, `curl -s https://checkip.amazonaws.com` followed by /32."
  }
}

variable "admin_principal_arns" {
  description = "IAM roles or users that administer the cluster. An empty list: whoever applies this."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.admin_principal_arns : can(regex("^arn:[a-z-]+:iam::[0-9]{12}:(role|user)/", arn))])
    error_message = "admin_principal_arns must be ARNs of IAM roles or users, such as arn:aws:iam::123456789012:role/admin."
  }
}

variable "namespace" {
  description = "Kubernetes namespace of the releases. Only its service accounts may reach the weights."
  type        = string
  default     = "sdar"

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.namespace)) && !contains(["default", "kube-system"], var.namespace)
    error_message = "namespace must be the name of a namespace of its own, not default or kube-system: access to the weights is granted by it."
  }
}

variable "learner" {
  description = "GPU nodes of the learner, on demand. max_gpus bounds what can run at once. efa puts them into one zone, close together, with EFA interfaces: for a learner over several nodes. zone: where, null for the first."
  type = object({
    instance_types = optional(list(string), ["g6e.12xlarge"])
    max_gpus       = optional(number, 4)
    efa            = optional(bool, false)
    zone           = optional(string)
  })
  default = {}

  validation {
    condition     = length(var.learner.instance_types) > 0 && alltrue([for type in var.learner.instance_types : can(regex("^(g|p)[0-9]+[a-z]*\\.[a-z0-9]+$", type))])
    error_message = "learner.instance_types must name NVIDIA instance types (families g and p), such as g6e.12xlarge."
  }
  validation {
    condition     = var.learner.max_gpus == floor(var.learner.max_gpus) && var.learner.max_gpus >= 1
    error_message = "learner.max_gpus must be a whole number from 1: it is the ceiling of what the learner can cost. Pools are empty while nothing runs."
  }
}

variable "rollout" {
  description = "GPU nodes of rollout and teacher. Spot, since both survive losing a node; add on-demand to capacity_types to fall back to it when there is no spot capacity. Many types make interruptions rarer."
  type = object({
    instance_types = optional(list(string), ["g6.2xlarge", "g6.4xlarge", "g5.2xlarge", "g5.4xlarge", "g6e.2xlarge"])
    capacity_types = optional(list(string), ["spot"])
    max_gpus       = optional(number, 10)
  })
  default = {}

  validation {
    condition     = length(var.rollout.instance_types) > 0 && alltrue([for type in var.rollout.instance_types : can(regex("^(g|p)[0-9]+[a-z]*\\.[a-z0-9]+$", type))])
    error_message = "rollout.instance_types must name NVIDIA instance types (families g and p), such as g6.2xlarge."
  }
  validation {
    condition     = length(var.rollout.capacity_types) > 0 && length(setsubtract(var.rollout.capacity_types, ["spot", "on-demand"])) == 0
    error_message = "rollout.capacity_types must hold spot, on-demand or both."
  }
  validation {
    condition     = var.rollout.max_gpus == floor(var.rollout.max_gpus) && var.rollout.max_gpus >= 1
    error_message = "rollout.max_gpus must be a whole number from 1: it is the ceiling of what rollouts and teachers can cost. Pools are empty while nothing runs."
  }
}

variable "environments" {
  description = "CPU nodes of the environments, spot by default."
  type = object({
    capacity_types = optional(list(string), ["spot"])
    max_cpus       = optional(number, 64)
  })
  default = {}

  validation {
    condition     = length(var.environments.capacity_types) > 0 && length(setsubtract(var.environments.capacity_types, ["spot", "on-demand"])) == 0
    error_message = "environments.capacity_types must hold spot, on-demand or both."
  }
  validation {
    condition     = var.environments.max_cpus == floor(var.environments.max_cpus) && var.environments.max_cpus >= 4
    error_message = "environments.max_cpus must be a whole number from 4, the smallest node of the pool."
  }
}

variable "control_max_cpus" {
  description = "Ceiling of the on-demand CPU nodes of gateway, Redis and whatever else asks for no pool, such as Prometheus."
  type        = number
  default     = 16

  validation {
    condition     = var.control_max_cpus == floor(var.control_max_cpus) && var.control_max_cpus >= 4
    error_message = "control_max_cpus must be a whole number from 4, the smallest node of the pool."
  }
}

variable "system_instance_type" {
  description = "Type of the two nodes that always run: DNS, storage drivers, Karpenter."
  type        = string
  default     = "t3.large"

  validation {
    condition     = can(regex("^[a-z0-9-]+\\.[a-z0-9]+$", var.system_instance_type)) && !can(regex("^(g|p)[0-9]", var.system_instance_type))
    error_message = "system_instance_type must be an x86-64 CPU instance type such as t3.large: these nodes never stop."
  }
}

variable "lustre_gib" {
  description = "Size of a FSx for Lustre file system for checkpoints, which a learner over several nodes needs; 0 for none. Billed for as long as it exists, used or not."
  type        = number
  default     = 0

  validation {
    condition     = var.lustre_gib == 0 || var.lustre_gib == 1200 || (var.lustre_gib > 0 && var.lustre_gib % 2400 == 0)
    error_message = "lustre_gib must be 0, 1200 or a multiple of 2400: FSx for Lustre comes in these sizes."
  }
}

variable "delete_weights_on_destroy" {
  description = "Whether `terraform destroy` deletes the weights that the bucket still holds. Without it destroy stops at a bucket that is not empty."
  type        = bool
  default     = false
}

variable "budget" {
  description = "Monthly limit of the whole account in USD, and who is told at 50 and 80% of it, and when it is forecast to be passed. A budget tells; it stops nothing."
  type = object({
    monthly_usd = number
    emails      = list(string)
  })

  validation {
    condition     = var.budget.monthly_usd > 0
    error_message = "budget.monthly_usd must be above 0."
  }
  validation {
    condition     = length(var.budget.emails) > 0 && length(var.budget.emails) <= 10 && alltrue([for email in var.budget.emails : can(regex("^[^@\\s]+@[^@\\s]+\\.[^@\\s]+$", email))])
    error_message = "budget.emails must hold 1 to 10 e-mail addresses: a budget that nobody hears is none."
  }
}

variable "activate_cost_tag" {
  description = "Show the tag project in Cost Explorer. AWS refuses it until resources with the tag have been billed: set it a day after the first apply."
  type        = bool
  default     = false
}
